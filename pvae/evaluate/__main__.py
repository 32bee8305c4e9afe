from pvae import cli, evaluation

if __name__ == "__main__":
    cli.run_main(evaluation.main)
