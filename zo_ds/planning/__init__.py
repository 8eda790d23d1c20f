"""What lies where: how much of a model stays on the device, what is fetched ahead, and what that costs in time."""
