"""DiaBlo, block-diagonal fine-tuning: its theory as executable checks, and the adapter that trains real models."""

__version__ = "0.1.0"
