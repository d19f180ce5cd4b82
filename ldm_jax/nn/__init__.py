"""The layers that networks are made of; each works on any number of spatial dimensions."""
