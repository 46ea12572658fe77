"""The mapping modules and code tables that ship with dicomcast."""
