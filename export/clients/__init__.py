"""Other people's programs, run on an exported folder and held to what the model says."""

from gptopt.export.clients.check import Said, check_clients
from gptopt.export.clients.limits import LIMITS
from gptopt.export.clients.registry import CLIENTS, Client, find_clients
from gptopt.export.clients.table import client_table

__all__ = ["CLIENTS", "LIMITS", "Client", "Said", "check_clients", "client_table", "find_clients"]
