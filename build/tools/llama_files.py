"""What llama.cpp reads beside our variants: a GGUF as it is, or as one of the types that it requantizes it to."""

AS_IT_IS = "the file"
EIGHT_BITS, FOUR_BITS = "Q8_0", "Q4_0"
