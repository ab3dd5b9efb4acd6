"""How weights are stored: the formats, which tensor gets which, and the weight file that all graphs share."""
