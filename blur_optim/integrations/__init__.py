"""BLUR inside other people's training loops. Each module needs the package it is named after; none is imported here."""
