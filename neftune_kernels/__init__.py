"""NEFTune noise, exact and fused: see https://arxiv.org/abs/2310.05914 and docs/specification.md."""

