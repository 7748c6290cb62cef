"""What `gpu.sh` asks of a GPU."""
