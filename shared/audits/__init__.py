"""Attacks on a trained model: membership inference and copies of training images."""
