"""Two training forwards of torchtitan's smallest Llama 3 on a CPU: its command line, its overrides
and its model. Its Trainer needs a GPU, and so does the backward of its attention. For `make ways`.
"""

import sys

import torch
from torchtitan.config import ConfigManager, apply_overrides

FIRST = 2  # every document's first token, and no other
DOCUMENTS = [[5, 4, 3], [2, 10]]  # two packed rows


def main() -> None:
    config = ConfigManager().parse_args(sys.argv[1:])
    apply_overrides(config.override, config)
    model = config.model_spec.model.build()
    model.init_states()
    model.requires_grad_(False)  # FlexAttention refuses what has a gradient on a CPU
    positions = torch.tensor([[at for one in row for at in range(one)] for row in DOCUMENTS])
    masks = model.get_attention_masks(positions)
    for step in range(2):
        tokens = torch.where(positions == 0, FIRST, 3 + step)
        assert model(tokens, positions=positions, attention_masks=masks).isfinite().all()


if __name__ == "__main__":
    main()
