"""Prompting an LLM: prompts, client, journal, and what is made of its answers."""
