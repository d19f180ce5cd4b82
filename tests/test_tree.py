import numpy as np
import pytest

from ldm_jax import tree

PARAMS = {"encoder": {"conv": {"kernel": np.zeros(3)}}, "decoder": [np.zeros(1), np.zeros(2)]}


def test_names_join_the_keys():
    assert tree.names(PARAMS) == ["decoder/0", "decoder/1", "encoder/conv/kernel"]


def test_the_first_rule_that_matches_the_whole_name_decides():
    rules = ((".*/kernel", ("a", None)), ("decoder/.*", None), (".*", "rest"))
    assert tree.map_by_rule(rules, PARAMS) == {
        "encoder": {"conv": {"kernel": ("a", None)}},
        "decoder": [None, None],
    }


def test_a_leaf_without_a_rule_raises():
    with pytest.raises(ValueError, match="no rule matches the leaf 'decoder/0'"):
        tree.map_by_rule(((".*/kernel", 1),), PARAMS)


def test_a_rule_without_a_leaf_raises():
    with pytest.raises(ValueError, match="match no leaf"):
        tree.map_by_rule(((".*/kernal", 1), (".*", 2)), PARAMS)
