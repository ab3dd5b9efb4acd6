"""How many drafts a step checks for each sequence: as many as pay, by measured times and by what was right so far."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from runtime.scheduling.prompt_lookup import LONGEST_MATCH, NO_PROPOSAL, SHORTEST_MATCH, PromptLookup, Proposal

FIRST_GUESS = 0.5  # of a draft's chance to be right, before any was seen
NEWEST_WEIGHT = 0.15  # of the newest draft in that chance
LEAST_CHANCE = 0.1  # a row whose token is less likely to count is not worth its share of attention and sampling
MARGIN = 1.05  # drafts must promise this many times the tokens a second, since the promise may be wrong
LEAST_SHARE = 0.97  # of its own tokens a second that each sequence keeps whatever the drafts of others
READ_AT_ONCE = 1024  # tokens that the lookup takes in at one step
RETRY_AFTER = 64  # steps without drafts because of their time, which is then measured anew: it may have changed


@dataclass
class DraftHistory:
    """What one sequence has to propose, and how often its proposals were right.

    Each proposal is compared with what came, whether it was checked in a step or not. So chances are learned while
    nothing is checked, at no cost, and drafts start as soon as a text begins to repeat itself.
    """

    lookup: PromptLookup = field(default_factory=PromptLookup)
    proposal: Proposal = NO_PROPOSAL
    _seen: int = 0  # tokens that the lookup has
    _chances: dict[int, float] = field(
        default_factory=lambda: dict.fromkeys(range(SHORTEST_MATCH, LONGEST_MATCH + 1), FIRST_GUESS)
    )

    @property
    def chance(self) -> float:
        """How likely each draft of the proposal is to be right, if those before it are."""
        return self._chances.get(self.proposal.matched, 0.0)

    def propose(self, tokens: Sequence[int], most: int) -> None:
        """Make the proposal for what follows `tokens`, which begin as at the last call.

        A long prompt is read in several calls, so that none takes long; there is no proposal before the last.
        """
        new = tokens[self._seen : self._seen + READ_AT_ONCE]
        self.lookup.extend(new)
        self._seen += len(new)
        self.proposal = self.lookup.propose(most) if self._seen == len(tokens) else NO_PROPOSAL

    def cut(self, drafts: int) -> None:
        """Keep only so many drafts of the proposal, from the first on."""
        if drafts < len(self.proposal.drafts):
            self.proposal = Proposal(self.proposal.drafts[:drafts], self.proposal.matched)

    def learn(self, came: Sequence[int]) -> None:
        """Compare the proposal with the tokens that came."""
        for draft, token in zip(self.proposal.drafts, came, strict=False):
            right = float(draft == token)
            chance = self._chances[self.proposal.matched]
            self._chances[self.proposal.matched] = chance + NEWEST_WEIGHT * (right - chance)
            if not right:
                return


@dataclass(frozen=True)
class Candidate:
    """A sequence that takes part in a step: how many drafts it has, and how likely each is to be right."""

    chance: float
    drafts: int

    def expected(self, drafts: int) -> float:
        """Tokens of a step with so many drafts: 1 + chance + chance^2 + ... (Leviathan et al., 2023, equation 1)."""
        return sum(self.chance**place for place in range(drafts + 1))


class DraftPlanner:
    """Decides on the drafts of each step; `seconds_of` predicts the time of a step with so many rows."""

    def __init__(self, step_rows: Sequence[int], seconds_of: Callable[[int], float]) -> None:
        self._step_rows = step_rows
        self._seconds_of = seconds_of
        self._refused = 0  # steps in a row in which likely drafts were left out because of their time

    def drafts(self, candidates: Sequence[Candidate], rows: int) -> list[int]:
        """Drafts of each candidate in a step that has `rows` rows without any; a candidate has one row of its own.

        The number of rows is chosen that promises the most tokens a second, and by which no sequence loses.
        """
        best, best_gain = [0] * len(candidates), MARGIN
        orders = [_order(candidates, self._step_rows[-1] - rows, fair) for fair in (False, True)]
        if not orders[0]:
            return best
        for size in self._step_rows:
            for order in orders:
                plan = _counts(order[: max(size - rows, 0)], len(candidates))
                slowdown = self._slowdown(rows, rows + sum(plan))
                gains = [one.expected(drafts) for one, drafts in zip(candidates, plan, strict=True)]
                gain = sum(gains) / len(gains) / slowdown
                if gain > best_gain and min(gains) >= LEAST_SHARE * slowdown:
                    best, best_gain = plan, gain
        return best if any(best) else self._retry(orders[0], len(candidates))

    def _slowdown(self, rows: int, with_drafts: int) -> float:
        """How much longer a step takes with drafts; without measured times, too long."""
        plain = self._seconds_of(rows)
        return self._seconds_of(with_drafts) / plain if 0 < plain < float("inf") else float("inf")

    def _retry(self, order: Sequence[int], candidates: int) -> list[int]:
        """No drafts, but for a single one from time to time."""
        self._refused += 1
        if self._refused < RETRY_AFTER:
            return [0] * candidates
        self._refused = 0
        return _counts(order[:1], candidates)


def _order(candidates: Sequence[Candidate], rows: int, fair: bool) -> list[int]:
    """Whose draft comes next in at most `rows` rows, as indices.

    It is the one that is likeliest to count or, if `fair`, one of the sequence that has gained least so far. The first
    adds the most tokens; by the second, sequences gain alike, so that a longer step slows none of them down.
    """
    chances = [one.chance if one.drafts else 0.0 for one in candidates]
    drafts, gains = [0] * len(candidates), [0.0] * len(candidates)
    order: list[int] = []
    while len(order) < rows:
        likely = [index for index, chance in enumerate(chances) if chance >= LEAST_CHANCE]
        if not likely:
            break
        index = min(likely, key=lambda one: (gains[one] if fair else 0.0, -chances[one]))
        order.append(index)
        drafts[index] += 1
        gains[index] += chances[index]
        chances[index] *= candidates[index].chance if drafts[index] < candidates[index].drafts else 0.0
    return order


def _counts(order: Sequence[int], candidates: int) -> list[int]:
    return [order.count(index) for index in range(candidates)]
