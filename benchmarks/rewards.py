"""The reward of the online pieces, in the one form that all frameworks can call."""


def distinct(prompts, completions, rows=None, **_) -> list[float]:
    """How many different characters a completion has, over its length; in [0, 1].

    Args:
      prompts, completions: texts, B each.
      rows: the data rows, where a framework passes them.
    """
    del prompts, rows
    return [len(set(text)) / max(len(text), 1) for text in completions]
