from q3vl_mini.demo.app import launch

launch(public=True)
