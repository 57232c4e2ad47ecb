"""Simulations with a known truth: does every interval cover and every p reject as often as it promises?"""
