"""Which pattern each site gets: what an option costs and loses, and which options a budget leaves.

request: what is asked for. options: what a site may become. sizing: what options take of the budget. losses, scoring,
reconstruction: what a pattern loses. knapsack: the choice under a budget. diversity: the paper's rule. front: other
budgets. choice: the result. `sparsec.search` puts them together.
"""
