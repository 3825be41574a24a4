"""DiffDis pretraining: one dual-stream diffusion network that generates and discriminates."""

__version__ = "0.1.0"
