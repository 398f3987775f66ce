"""What helps to choose `clipping`: how gradients lie to weights in batches that train nothing."""
