"""Recipes: plain training loops on real data, and the loaders they read it with."""
