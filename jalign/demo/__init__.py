"""The embedded tiny model with its data, and the recipe that aligns it in minutes."""

#from jalign.demo.recipe import DemoConfig, run_demo

#__all__ = ["DemoConfig", "run_demo"]
