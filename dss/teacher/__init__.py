"""Annotation by an LLM teacher: prompts, API client, journal, parsing and export."""
