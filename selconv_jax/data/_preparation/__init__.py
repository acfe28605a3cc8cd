"""Preparation of data sets: conversion of the original files to those that training reads."""
