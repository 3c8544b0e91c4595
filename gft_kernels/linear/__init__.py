"""The loss from hidden states: the loop over chunks of rows, and the three matrix products it is made of."""
