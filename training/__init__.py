"""What surrounds the training loop: flags, the folder of a run, cached inputs, several processes, the device."""
