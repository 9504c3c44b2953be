"""Hosts: one adapter per foreign library; the only modules that know one."""
