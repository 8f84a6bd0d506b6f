"""Where bytes are kept: node memory, node disk, shared storage. Everything here goes through `FileSystem`."""
