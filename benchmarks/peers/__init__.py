"""What the project is measured against: every peer is a process of its own, so that interleaved runs are fair."""
