"""`python -m pipeline.recipe_docs > docs/recipes.md` writes the page of all recipe fields."""

from pipeline.cli.recipe_docs import page

if __name__ == "__main__":
    print(page(), end="")
