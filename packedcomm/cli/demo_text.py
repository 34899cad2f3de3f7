"""The demo's sentences: pairs of one meaning to train on, fixed ones to compare outputs."""

from __future__ import annotations

__all__ = ["PROBES", "SENTENCE_PAIRS"]

SENTENCE_PAIRS = (
    ("The train to the coast leaves at nine.", "At nine o'clock a train departs for the sea."),
    ("She repaired the old bicycle herself.", "Without any help, she fixed her worn-out bike."),
    ("Prices of vegetables rose after the frost.", "Greens became dearer once it had frozen."),
    ("The meeting was moved to Thursday.", "They postponed the discussion until Thursday."),
    ("A small boat crossed the lake at dawn.", "At sunrise a dinghy went over the water."),
    ("He forgot his keys on the kitchen table.", "His keys were left lying in the kitchen."),
    ("The library closes early in winter.", "In the cold months the library shuts sooner."),
    ("Two engineers measured the bridge.", "The bridge was surveyed by a pair of engineers."),
)

PROBES = (
    "Bread is baked in the village every morning.",
    "The satellite sends one picture an hour.",
    "Nobody had expected the violinist to stop playing.",
    "Water boils at a lower temperature in the mountains.",
    "The committee published its findings in spring.",
)
