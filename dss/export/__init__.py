"""Exports of a trained student."""
