"""What becomes a repository of the Hugging Face kernel hub: see assemble.py."""
