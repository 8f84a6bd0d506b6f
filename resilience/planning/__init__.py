"""Decisions: pure functions over frozen values. No path, socket, clock or tensor ever enters this room."""
