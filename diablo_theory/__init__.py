"""DiaBlo, block-diagonal fine-tuning: the theory as executable checks, the adapter for real models."""

__version__ = "0.1.0"
