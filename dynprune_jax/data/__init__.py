"""Data sets through TensorFlow Datasets, and augmentation on the device."""
