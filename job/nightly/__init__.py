"""Nightly regressions: what a night has measured, how it is judged, and how that is told."""
