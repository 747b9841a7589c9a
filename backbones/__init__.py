"""The tiny models of the demo, and the scripts that make them."""
