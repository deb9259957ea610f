"""Measurements of speed and memory, and what they are measured against. Nothing outside imports them but their test."""
