"""sdtrain: latent diffusion models from raw web metadata to samples."""

__version__ = "0.1.0"
