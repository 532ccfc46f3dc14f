"""The target service: runs the large model and verifies the proposals of many sessions in shared forward passes."""
