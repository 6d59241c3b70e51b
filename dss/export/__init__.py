"""Exports trained students to other programs' formats."""
