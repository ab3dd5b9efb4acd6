"""What calibration keeps of the inputs of a matrix: their second moments, or only the diagonal of these."""

from dataclasses import dataclass, field

import torch

from export.weights.format import Float32


@dataclass
class Moments:
    """Sums over the inputs (tokens, K) of one matrix, and the inputs of the first row, on which errors are measured."""

    whole: bool  # keep X^T X, and not only its diagonal
    tokens: int = 0
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # (K, K) or (K,)
    sample: torch.Tensor | None = None

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs (tokens, K)."""
        if self.sample is None:
            self.sample = inputs.clone()
            k = inputs.shape[1]
            self.sums = torch.zeros((k, k) if self.whole else (k,))
        if self.whole:
            self.sums.addmm_(inputs.T, inputs)
        else:
            self.sums += inputs.square().sum(0)
        self.tokens += len(inputs)

    def take_second_moment(self) -> torch.Tensor:
        """H = X^T X / n (K, K), which these moments then no longer hold: it can take most of the memory."""
        sums, self.sums = self.sums, self.sums.new_zeros(())
        return sums.div_(self.tokens)

    def importance(self) -> Float32:
        """The mean square of each column of the inputs (K,)."""
        diagonal = self.sums.diagonal() if self.whole else self.sums
        found: Float32 = (diagonal / self.tokens).numpy()
        return found

    def outputs(self, rows: Float32) -> torch.Tensor:
        """The outputs (tokens, N) that rows of a matrix give for the first row of the text."""
        assert self.sample is not None
        return self.sample @ torch.from_numpy(rows).T
