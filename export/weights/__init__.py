"""How weights are stored: the formats, the choice of one for each tensor, and the weight file that all graphs share."""
