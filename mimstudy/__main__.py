"The command as a module: python -m mimstudy."

from mimstudy.cli.commands import app

app(prog_name='mimstudy')
