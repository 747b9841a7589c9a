"""The two tiny models of the demo, and the script that makes them."""
