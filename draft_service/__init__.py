"""The draft service: runs the small model and proposes tokens, ahead of what is being verified."""
