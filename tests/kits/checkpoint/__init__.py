"""For the tests of checkpoints: snapshots, images, restores, GPUs."""
