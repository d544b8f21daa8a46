"""The embedded tiny model with its data, and the recipe that aligns it in minutes."""

from jalign.demo.recipe import ASSETS, DemoConfig, run_demo

__all__ = ["ASSETS", "DemoConfig", "run_demo"]
