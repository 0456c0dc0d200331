"""Many run folders side by side: what differs between them, which is better, and by how much."""
