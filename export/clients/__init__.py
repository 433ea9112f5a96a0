"""Other people's programs, run on an exported folder and held to what the model says."""

from gptopt.export.clients.check import Said, check_clients
from gptopt.export.clients.registry import CLIENTS, Client, find_clients

__all__ = ["CLIENTS", "Client", "Said", "check_clients", "find_clients"]
