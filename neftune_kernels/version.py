__version__ = "0.1.0"
SPEC_VERSION: int = 1  # of docs/specification.md: the bits of a given seed and place belong to it
