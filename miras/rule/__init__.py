"""A rule: the four choices put together, and the paper's update, once. `composition` says which go together."""

from miras.rule.rule import Gates as Gates
from miras.rule.rule import Rule as Rule
from miras.rule.rule import State as State
from miras.rule.rule import orient as orient
from miras.rule.rule import token as token
