"""Brain lesion masks from one MR image of any modality. Research use only, not a medical device."""

__version__ = "0.1.0"
